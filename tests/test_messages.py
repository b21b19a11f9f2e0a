"""What is said when something outside goes wrong: in short, without paths of the library's makers, and once."""

import logging

import pytest

from bayesmeta.train.compilation.quiet import without_shim_messages
from bayesmeta.train.distributed import _in_short

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:12345. This "
    "means a remote process has terminated or is unable to make progress. Please check the logs."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GLOO, "Connection closed by peer [127.0.0.1]:12345"),
        ("Timed out after 30.5 s waiting\nfor all", "Timed out after 30.5 s waiting"),
        ("[rank 3] is gone", "[rank 3] is gone"),  # what is no file is kept
        ("", "RuntimeError"),
    ],
)
def test_an_error_of_torch_is_its_first_sentence(text, expected):
    assert _in_short(RuntimeError(text)) == expected


def test_an_error_without_end_is_cut_between_words():
    short = _in_short(RuntimeError("word " * 200))
    assert len(short) <= 300
    assert short.endswith("word …")


def test_the_compilers_message_about_shims_alone_is_left_out(caplog):
    log = logging.getLogger("torch._inductor.ir")
    shim = ("%s is missing a c-shim implementation, using proxy executor as fallback", "aten.linalg_cholesky_ex")
    before = list(log.filters)
    log.addHandler(caplog.handler)
    try:
        with without_shim_messages():
            log.warning(*shim)
            log.warning("something else")
        assert {record.getMessage() for record in caplog.records} == {"something else"}
        caplog.clear()
        log.warning(*shim)
        assert caplog.records, "as it was"
        assert log.filters == before
        with pytest.raises(KeyError), without_shim_messages():
            raise KeyError
        assert log.filters == before
    finally:
        log.removeHandler(caplog.handler)
