"""The live page in a real browser, served by the real server from a real engine with a clock that the tests set."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from engine import RiskEngine
from engine.access import Address, Token
from engine.config import REASONS
from engine.instants import instant_text
from engine.pulse import Pulse
from engine.service import Service
from tests.adapters.needs import need_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.adapters.browser import Visit

SECOND = 10**9
START_NS = 1_767_225_600 * SECOND  # 2026-01-01
WIDTHS = (360, 1280, 2560)


class Site:
    """A server with an engine and a clock.

    Attributes:
        engine: Which is served.
        now_ns: What its wall clock shows.
        url: Where the page is.
    """

    def __init__(self, token: str | None = None, port: int = 0, **options: Any) -> None:
        from engine.adapters.http_listener import HttpServer  # noqa: PLC0415 - an extra
        from engine.adapters.http_server import Served, page  # noqa: PLC0415

        self.now_ns = START_NS
        self.engine = RiskEngine(**({"users": 300_000, "clock": "wall", "now": lambda: self.now_ns} | options))
        self.failures: list[str] = []
        service = Service.of(self.engine)
        pulse = Pulse(service, lambda: self.now_ns, lambda: self.now_ns / SECOND, lambda: 400 << 20)
        served = Served(service, token and Token(token), page=page(), events=pulse.text, failed=self.failures.append)
        self._server = HttpServer(served, Address("127.0.0.1", port))
        self.url = f"http://{self._server.address}/"

    def pay(self, *rows: tuple[Any, Any, float]) -> None:
        """Rows of (user, amount, seconds before now)."""
        users, amounts, ages = zip(*rows, strict=True)
        times = np.array([self.now_ns - round(age * SECOND) for age in ages]).view("datetime64[ns]")
        decimals = pa.array([None if amount is None else Decimal(str(amount)) for amount in amounts], pa.decimal128(20, 8))
        self.engine.ingest({"user_id": pa.array(users), "amount": decimals, "timestamp": times})

    def at(self, seconds: float) -> np.datetime64:
        """An instant so many seconds after now."""
        return np.datetime64(self.now_ns + round(seconds * SECOND), "ns")

    def stop(self) -> None:
        """End the server."""
        self._server.stop()
        assert self.failures == []


@pytest.fixture(scope="module")
def _browser() -> Iterator[Browser]:
    need_browser()
    from tests.adapters.browser import chromium  # noqa: PLC0415 - only here it is known that it is installed

    with chromium() as browser:
        yield browser


@pytest.fixture
def site(_browser: Browser) -> Iterator[Callable[..., Site]]:
    with ExitStack() as started:

        def make(**options: Any) -> Site:
            made = Site(**options)
            started.callback(made.stop)
            return made

        yield make


@pytest.fixture
def visit(_browser: Browser) -> Iterator[Callable[..., Visit]]:
    from tests.adapters.browser import Visit  # noqa: PLC0415

    with ExitStack() as open_ones:

        def look(url: str, **looks: Any) -> Visit:
            made = Visit(_browser, **looks)
            open_ones.callback(made.close)
            made.page.goto(url)
            return made

        yield look


def live(visit: Visit) -> None:
    visit.page.wait_for_selector("#status[data-state=live]")


def says(visit: Visit, selector: str, text: str) -> None:
    """Wait until an element says just this."""
    from playwright.sync_api import expect  # noqa: PLC0415

    expect(visit.page.locator(selector)).to_have_text(text, timeout=60_000)


def shown_score(score: float) -> str:
    return f"{score:,.2f}"


def exact_score(score: float) -> str:
    """As JavaScript writes it, with commas."""
    text = repr(score).removesuffix(".0")
    whole, dot, rest = text.partition(".")
    return f"{int(whole):,}{dot}{rest}"


ROWS: tuple[tuple[Any, Any, float], ...] = (
    *[("alice", "10.25", 50), ("alice", "2000.0001", 30.5), ("alice", "3", 1), ("bob", "1000", 20), ("carol", "-5", 10)],
    *[("dave", "333.3333", 59), ("dave", "0.0001", 3), ("dave", "1", 2), ("erin", "0", 5), ("gone", "9999", 61)],
    *[(None, "1", 0), ("late", "1", 1000), ("frank", None, 3)],
)


def test_numbers_are_those_of_the_engine(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    here = site()
    here.pay(*ROWS)
    seen = visit(here.url)
    live(seen)
    says(seen, "#top tbody tr:nth-child(5) .rank", "5")
    top = here.engine.top(10).to_pylist()
    wanted = [
        [str(rank), "", row["user_id"], f"{row['sum']:,}", str(row["count"]), shown_score(row["score"])] for rank, row in enumerate(top, 1)
    ]
    assert seen.table("#top") == wanted
    stats = here.engine.stats()
    assert seen.text("#users") == str(stats.users) and seen.text("#retained") == f"with {stats.transactions} transactions"
    assert seen.text("#clock") == "23:59:59" and seen.text("#lag") == "lag 1.00 s"
    assert seen.text("#memory") == "400 MiB"
    refused = [[row[0], row[2]] for row in seen.table("#refused")]
    assert refused == [[name.replace("_", " "), str(count)] for name, count in stats.rejected.items()]
    assert seen.text("#share-more") == f"{sum(stats.rejected.values())} of {stats.rows} rows in all"
    assert [row[2] for row in wanted] == ["bob", "alice", "dave", "erin", "carol"]
    here.now_ns += 12 * SECOND
    here.pay(*[("zoe", 5000, 0)] * 24)
    says(seen, "#rate", "2")  # 24 rows in twelve seconds
    says(seen, "#top tbody tr:first-child .who button", "zoe")
    assert seen.table("#top")[0] == ["1", "new", "zoe", "120,000.0000", "24", "5,000.00"]
    moved = [row[1:3] for row in seen.table("#top")[1:]]  # a payment of alice's, a small one, has left the window, and dave's great one
    assert moved == [["", "alice"], ["▼ 2down 2", "bob"], ["▼ 1down 1", "dave"], ["▼ 1down 1", "erin"], ["▼ 1down 1", "carol"]]
    here.now_ns += 200 * SECOND
    says(seen, "#lag", "lag 3 min")
    seen.page.wait_for_selector("#top-none:not([hidden])")
    assert seen.complaints == []


@pytest.mark.parametrize("closed", ["both", "right"])
def test_the_curve_is_what_the_engine_will_say(site: Callable[..., Site], visit: Callable[..., Visit], closed: str) -> None:
    here = site(closed=closed)
    here.pay(*ROWS, ("alice", "700", -8))  # has come before its time
    seen = visit(here.url)
    live(seen)
    seen.page.fill("#user", "alice")
    seen.page.fill("#at", "2026-01-01T00:00:00Z")
    seen.page.press("#user", "Enter")
    says(seen, "#who", "alice")
    found = here.engine.explain("alice", at=here.at(0))
    assert seen.text("#score") == shown_score(found.score)
    assert seen.text("#formula") == f"sum {found.sum:,} / 3 transactions = {exact_score(found.score)}"
    amounts = [f"{row['amount']:,}" for row in found.transactions.to_pylist()]
    assert [row[1:] for row in seen.table("#rows")] == [
        [amount, left] for amount, left in zip(amounts, ["10.0 s", "29.5 s", "59.0 s"], strict=True)
    ]
    # Each step, and the instants before it and between two.
    texts = seen.table("#steps")
    reach = here.engine.config.reach_ns
    leaves = sorted({reach + 1 - round(age * SECOND) for age in (50, 30.5, 1, -8)} | {8 * SECOND})
    steps = [0, *leaves]
    assert len(texts) == len(steps)
    for row, after in zip(texts, steps, strict=True):
        assert row[0] == instant_text(here.now_ns + after)[11:-1]
        for offset in (0, 1):
            features = here.engine.features(["alice"], at=np.datetime64(here.now_ns + after + offset, "ns")).to_pylist()[0]
            assert row[2:] == [str(features["count"]), re.sub(r"\.0$", "", repr(features["score"]))]
        if after:
            before = here.engine.score("alice", at=np.datetime64(here.now_ns + after - 1, "ns"))
            assert row[3] != re.sub(r"\.0$", "", repr(float(before)))
    for after in (0.5, 7.9, 8.0, 9.7, 10.0, 12.25, 29.4, 35.0, 59.5, 60.0):
        seen.page.locator("#later").evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(after * 1e9)
        )
        features = here.engine.features(["alice"], at=here.at(after)).to_pylist()[0]
        assert f"score {exact_score(features['score'])} of {features['count']} transaction" in seen.text("#reading")
    drawn = seen.page.locator("#curve .line").get_attribute("d") or ""
    assert drawn.count("V") == len([after for after in leaves if after <= reach + 1])
    assert "if nothing more arrives: 671.08" in (seen.page.locator("#curve-name").text_content() or "")
    assert seen.complaints == []


def test_a_frozen_instant(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    here = site()
    here.pay(*ROWS)
    seen = visit(f"{here.url}#user=alice&at=2025-12-31T23:59:40Z")
    says(seen, "#score", shown_score(here.engine.score("alice", at=here.at(-20))))
    assert seen.text("#mode") == "frozen at 2025-12-31T23:59:40"
    rows = seen.table("#steps")  # the row of a second before START is still to come: it has entered by then
    assert [row[2] for row in rows] == ["2", "3", "2", "1", "0"]
    assert rows[1][:2] == ["23:59:59", "19.000 s"]
    assert rows[1][3] == repr(float(here.engine.score("alice", at=here.at(-1))))
    here.now_ns += 5 * SECOND
    says(seen, "#lag", "lag 6.00 s")  # time goes on, but not for what is frozen
    assert seen.text("#score") == shown_score(here.engine.score("alice", at=np.datetime64(START_NS - 20 * SECOND, "ns")))
    seen.page.fill("#at", "2025-12-31T20:00:00Z")
    seen.page.press("#at", "Enter")
    seen.page.wait_for_selector("#said:not([hidden])")
    assert "the oldest instant that is still exact" in seen.text("#said")
    seen.page.fill("#at", "yesterday")
    seen.page.press("#at", "Enter")
    says(seen, "#said", "at='yesterday' is no instant; write it as in '2026-01-31T12:00:00Z'")
    seen.page.click("#follow")
    says(seen, "#who", "bob")
    assert seen.page.locator("#said").is_hidden()


def test_scores_beyond_what_floats_hold_are_exact(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    here = site()
    here.pay(*[("big", "900719925474.0991", age) for age in range(1, 7)], ("big", "0.0001", 7), ("big", "-33.3333", 8))
    seen = visit(f"{here.url}#user=big")
    says(seen, "#who", "big")
    for row, after in zip(seen.table("#steps"), [0, *[60 * SECOND + 1 - age * SECOND for age in range(8, 0, -1)]], strict=True):
        assert float(row[3]) == here.engine.score("big", at=np.datetime64(here.now_ns + after, "ns"))


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>document.title='owned'</script>",
    "\u202eabc\u0000\n\t'\"&amp;",
    "a/b?c#d%2e%2e/ü😀",
    "x" * 3000,
]


def test_ids_with_markup_are_texts(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    here = site()
    here.pay(*[(user, 100 - place, 1) for place, user in enumerate(HOSTILE)])
    seen = visit(here.url)
    live(seen)
    says(seen, "#top tbody tr:nth-child(5) .rank", "5")
    assert [row[2] for row in seen.table("#top")] == HOSTILE
    for place, user in enumerate(HOSTILE, 1):
        seen.page.click(f"#top tbody tr:nth-child({place}) button")
        seen.page.wait_for_function("user => document.querySelector('#who').textContent === user", arg=user)
        says(seen, "#score", shown_score(101.0 - place))
    assert seen.page.locator("main img, main script").count() == 0
    assert "riskring" in seen.page.title()
    assert seen.complaints == []


@pytest.mark.parametrize(("user", "text"), [(9_223_372_036_854_775_807, "9223372036854775807"), (b"\x00\xffA", "00ff41")])
def test_other_kinds_of_ids(site: Callable[..., Site], visit: Callable[..., Visit], user: Any, text: str) -> None:
    here = site()
    here.pay((user, 12, 1))
    seen = visit(here.url)
    says(seen, "#who", text)
    says(seen, "#score", "12.00")
    seen.page.fill("#user", "no such id")
    seen.page.press("#user", "Enter")
    seen.page.wait_for_selector("#said:not([hidden])")
    assert "cannot be a user id here" in seen.text("#said")


def test_it_connects_again_when_the_server_is_back(site: Callable[..., Site], visit: Callable[..., Visit], free_port: int) -> None:
    first = Site(port=free_port)
    first.pay(("alice", 10, 1))
    seen = visit(first.url)
    live(seen)
    says(seen, "#who", "alice")
    first.stop()
    says(seen, "#status", "reconnecting")
    assert seen.text("#why").endswith("What is shown is of 00:00:00 UTC.")
    second = site(port=free_port)
    second.pay(("bob", 20, 1))
    says(seen, "#status", "live")
    says(seen, "#who", "bob")
    assert seen.page.locator("#banner").is_hidden()
    assert all("ERR_" in said for said in seen.complaints)  # what a browser itself says of lost connections


def test_a_token_is_asked_for_and_kept_in_the_tab(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    here = site(token="correct-horse-battery-staple")
    here.pay(("alice", 10, 1))
    seen = visit(here.url)
    says(seen, "#status", "a token is needed")
    seen.page.fill("#token", "a wrong one")
    seen.page.press("#token", "Enter")
    says(seen, "#why", "The token is another. Enter the right one; it is kept in this tab only.")
    seen.page.fill("#token", "correct-horse-battery-staple")
    seen.page.press("#token", "Enter")
    live(seen)
    says(seen, "#who", "alice")
    kept = seen.page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie, location.href]")
    assert kept[0] == ["correct-horse-battery-staple"] and "staple" not in str(kept[1:])
    seen.page.reload()
    live(seen)


def test_nothing_comes_from_elsewhere_and_the_policy_is_strict(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    here = site()
    here.pay(*ROWS)
    seen = visit(here.url)
    live(seen)
    says(seen, "#who", "bob")
    assert {url.split("/")[2] for url in seen.requests if not url.startswith("data:")} == {here.url.split("/")[2]}
    policy = seen.page.request.get(here.url).headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert policy.count("'sha256-") == 2
    seen.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\" id=styled>x</p>')")
    assert seen.page.locator("#styled").evaluate("it => getComputedStyle(it).color") != "rgb(255, 0, 0)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everybody_can_use_it(site: Callable[..., Site], visit: Callable[..., Visit], width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415 - an extra

    here = site()
    here.pay(*ROWS, *[(f"user-{number}", 10 * number + 1, number) for number in range(1, 40)], ("x" * 300, 9000, 3))
    seen = visit(here.url, width=width, scheme=scheme)
    live(seen)
    says(seen, "#top tbody tr:nth-child(10) .rank", "10")
    seen.page.wait_for_selector("#found:not([hidden])")
    seen.page.click("summary")
    found = Axe().run(seen.page)
    assert found.violations_count == 0, found.generate_report()
    wide = seen.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0  # nothing sticks out
    background = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(243, 245, 248)", "dark": "rgb(12, 16, 22)"}[scheme]
    assert seen.complaints == []


def test_by_keyboard_alone(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    here = site()
    here.pay(*ROWS)
    seen = visit(here.url)
    live(seen)
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.id") == "theme"
    for wanted in ("light", "dark", "auto", "light", "dark"):
        seen.page.keyboard.press("Enter")
        says(seen, "#theme", f"Theme: {wanted}")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(12, 16, 22)"
    seen.page.reload()
    says(seen, "#theme", "Theme: dark")
    live(seen)
    says(seen, "#top tbody tr:nth-child(2) .who button", "alice")
    seen.page.focus("#theme")
    for _ in range(2):
        seen.page.keyboard.press("Tab")
    seen.page.keyboard.press("Enter")
    says(seen, "#who", "alice")
    outline = seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert (seen.page.evaluate("document.activeElement.textContent"), outline) == ("alice", "solid")
    here.pay(("alice", 5000, 0))  # who moves up keeps the focus
    says(seen, "#top tbody tr:first-child .who button", "alice")
    assert seen.page.evaluate("document.activeElement.textContent") == "alice"
    seen.page.focus("#later")
    for key in ("PageDown", "ArrowLeft", "PageUp", "PageUp", "ArrowRight"):
        seen.page.keyboard.press(key)
    assert "In 2.1 s, at 00:00:02.1" in seen.text("#reading")


def test_many_users_do_not_slow_it(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    here = site()
    users = 250_000
    here.engine.ingest(
        {"user_id": np.arange(users), "amount": np.arange(users), "timestamp": np.full(users, np.datetime64(START_NS, "ns"))}
    )
    seen = visit(here.url)
    says(seen, "#top tbody tr:first-child .who button", str(users - 1))
    assert [row[2] for row in seen.table("#top")] == [str(users - place) for place in range(1, 11)]
    nodes = seen.page.evaluate("document.querySelectorAll('*').length")
    assert nodes < 600  # a page as small as for few users
    busy = threading.Event()

    def pay_on() -> None:
        while not busy.is_set():
            here.pay(*[(user, 1, 0) for user in range(1000)])

    paying = threading.Thread(target=pay_on)
    paying.start()
    try:
        for _ in range(3):
            before = seen.page.evaluate("asked")
            seen.page.wait_for_function("before => asked > before", arg=before)
    finally:
        busy.set()
        paying.join()
    assert seen.complaints == []


def test_the_demonstration_is_alive_at_once(visit: Callable[..., Visit], tmp_path: Path, free_port: int) -> None:
    from playwright.sync_api import expect  # noqa: PLC0415 - only here it is known that it is installed

    from tests.adapters.test_serving import ServerProcess  # noqa: PLC0415

    server = ServerProcess(tmp_path, "--demo", "--users", "1M", port=free_port)
    try:
        server.launch()
        server.ready()
        seen = visit(server.url)
        live(seen)
        says(seen, "#top tbody tr:nth-child(10) .rank", "10")
        expect(seen.page.locator("#users")).to_have_text(re.compile(r"\d\d,\d{3}|100,000"), timeout=60_000)
        expect(seen.page.locator("#rate")).to_have_text(re.compile(r"\d+,\d{3}|.*M"), timeout=60_000)
        expect(seen.page.locator("#refused tbody tr")).to_have_count(8, timeout=60_000)
        seen.page.wait_for_selector("#found:not([hidden])")
        assert seen.complaints == []
        assert server.stop() == 0
        assert not [line for line in server.printed().splitlines() if '"error"' in line]
    finally:
        server.kill()


def test_each_reason_has_a_meaning() -> None:
    from engine.adapters.http_server import page  # noqa: PLC0415 - an extra

    text = page() or ""
    assert [reason for reason in REASONS if f"{reason}:" not in text] == []
    assert not re.search(r"""\son\w+\s*=\s*["']|\sstyle\s*=\s*["']|innerHTML|eval\(|https?://(?!www\.w3\.org/2000/svg)""", text)
