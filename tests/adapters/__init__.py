"""Tests with real servers, which fixtures start and end."""
