-- Rolling risk scores in plain Flink SQL: a Kafka topic of JSON transactions in, a Kafka topic of their scores out. For those who run Flink
-- and want no Python where data passes. `riskring flink` hosts the engine instead; it differs from a node in nothing, and this does.
--
--     bin/sql-client.sh --jar flink-sql-connector-kafka-5.0.0-2.2.jar -f flink_sql.sql
--
-- Needs Flink 2.2 and Java 11, 17 or 21. Parameters are in the two tables that follow; the window is in the last line.
--
-- Where scores are those of the engine (time_unit="ms", decimals=4), to the last bit: for each row of a user whose rows within the window came
-- in the order of their times, each with another time, and none of them was dropped. What is different, and why:
--
--  1. Rows of equal time are peers. All rows of a user with one time get one score, that of all of them (RANGE). The engine scores each row as it
--     comes, over those before it and itself; what it answers for that instant afterwards is the score given here.
--  2. Rows are sorted first. A row that comes late, but in time, counts in the scores of all later times, also of rows that came before it. The
--     engine has scored those by then; what it answers for those instants afterwards is again the score given here.
--  3. Nothing is told before the watermark has passed it: a score comes out when a row comes that is later by more than the lateness below. The
--     last rows of a topic wait until others come. Partitions of which nothing comes hold everybody up, until `table.exec.source.idle-timeout`.
--  4. Late is judged by user, not by the clock of the partition. A row is dropped, silently, if its time is not later than that at which the
--     user's state was last looked at; else it is taken, however far behind the watermark it is. The engine takes every row that is not more
--     than its lateness behind the clock, tells the reason of each that it does not take, and scores a late row exactly.
--  5. "Looked at" is more than "scored": the operator also sets a timer to clean up, one and a half windows and a millisecond after a row, and
--     another whenever a row comes that is later than that one less half a window. It never takes one back. One that fires while there are
--     newer rows cleans nothing, but drops rows as if the user had been scored at that time.
--  6. Users are forgotten: when the last of these timers fires, all of the user's state goes, and with it the time up to which rows are late. Rows
--     older than that are taken again, and scored without those that were forgotten.
--  7. A user who falls silent is not told of: scores of rows come out, no decay to 0.0. There is no lookup for an instant.
--  8. Amounts of more than four decimals are rounded half up, by the engine half to even. Those of 10**14 and more are dropped, by the
--     engine those of 2**53 / 10**4 and more (some 9 * 10**11). There is no bound for sums, and one for which 10,000 times the sum
--     has 2**53 or more is rounded twice.
--  9. Rows without a user, an amount or a time, and messages that are no such JSON object, are dropped silently. There are no dead letters.
--     Times at or before 1970 are dropped, too, since 0 is when a new user was last looked at. Nothing is "too far ahead": one row of a broken
--     clock, even one that is dropped, moves the watermark, and scores that it passes come out without what others send later.
-- 10. Whether a row belongs to its partition is not checked: users are sent to their operator by name, wherever they came from. With more than one
--     partition or operator, which rows are late depends on how fast each is read, so two runs may differ. The engine's state is a function of the log.
-- 11. State is kept for one and a half windows after a user's last row, as rows of Flink's own format: some ten times what the engine takes.

SET 'pipeline.name' = 'riskring-sql';
SET 'execution.checkpointing.interval' = '10 s';
SET 'table.exec.source.idle-timeout' = '10 s';

CREATE TEMPORARY TABLE transactions (
    user_id STRING,
    amount DECIMAL(18, 4),
    `timestamp` BIGINT,                                             -- milliseconds since 1970
    `partition` INT METADATA VIRTUAL,
    `offset` BIGINT METADATA VIRTUAL,
    event_time AS TO_TIMESTAMP_LTZ(`timestamp`, 3),
    WATERMARK FOR event_time AS event_time - INTERVAL '1' SECOND    -- how far rows may be out of order; at least a millisecond, for peers
) WITH (
    'connector' = 'kafka',
    'topic' = 'transactions',
    'properties.bootstrap.servers' = 'localhost:9092',
    'properties.group.id' = 'riskring-sql',
    'scan.startup.mode' = 'earliest-offset',
    'format' = 'json',
    'json.ignore-parse-errors' = 'true'
);

CREATE TEMPORARY TABLE scores (
    user_id STRING,
    amount DECIMAL(18, 4),
    `timestamp` BIGINT,
    `sum` DECIMAL(38, 4),
    `count` BIGINT,
    score DOUBLE,
    source_partition INT,
    source_offset BIGINT
) WITH (
    'connector' = 'kafka',
    'topic' = 'scores',
    'properties.bootstrap.servers' = 'localhost:9092',
    'format' = 'json'
);

-- Units over (units of one * count): both are whole numbers, and one division of doubles rounds their quotient correctly.
INSERT INTO scores
SELECT
    user_id, amount, `timestamp`, `sum`, `count`,
    CAST(`sum` * 10000 AS DOUBLE) / CAST(`count` * 10000 AS DOUBLE),
    `partition`, `offset`
FROM (
    SELECT user_id, amount, `timestamp`, `partition`, `offset`, SUM(amount) OVER w AS `sum`, COUNT(*) OVER w AS `count`
    FROM transactions
    WHERE user_id IS NOT NULL AND amount IS NOT NULL AND event_time IS NOT NULL
    WINDOW w AS (PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL '60' SECOND PRECEDING AND CURRENT ROW)
);
