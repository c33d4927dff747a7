"""Reading /metrics: names, labels with escapes, values, and what is no exposition."""

from __future__ import annotations

import pytest

from server.demo.exposition import samples_of

TEXT = """\
# HELP nv_inference_request_success Number of successful requests
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="digits",version="1"} 12
nv_inference_request_success{model="digits",version="2"} 30
nv_inference_request_success{model="other",version="1"} 5
up 1
with_time{a="x"} 2.5 1700000000000
bucket{le="+Inf"} +Inf
"""


def test_sums_over_the_series_that_carry_the_labels() -> None:
    scrape = samples_of(TEXT)
    assert scrape.total("nv_inference_request_success", model="digits") == 42
    assert scrape.total("nv_inference_request_success", model="digits", version="2") == 30
    assert scrape.total("nv_inference_request_success", model="none") == 0
    assert scrape.total("up") == 1
    assert scrape.total("with_time") == 2.5
    assert scrape.total("bucket") == float("inf")
    assert {"up", "with_time"} <= scrape.names()


def test_escapes_in_labels() -> None:
    (series,) = samples_of(r'name{path="a\\b\"c\nd,e=}"} 1').series
    assert series.labels == {"path": 'a\\b"c\nd,e=}'}


def test_no_exposition_is_refused() -> None:
    with pytest.raises(ValueError, match="not a line"):
        samples_of("<html>")
