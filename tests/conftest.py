import signal

import pytest
import torch


def pytest_configure():
    # what a shell starts in the background ignores Ctrl-C, and so would the runs that tests send one to
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # two xdist workers on two cores: more threads only get in each other's way
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _global_state_is_untouched():
    """No test may see, and no code may leave, another global state."""
    import pyro

    torch.manual_seed(0)  # torch's own first seed is another in each process: a test must not hang on it
    before = (torch.get_default_dtype(), torch.get_rng_state().clone(), len(pyro.get_param_store()))
    yield
    torch.set_rng_state(before[1])
    assert torch.get_default_dtype() == before[0]
    assert len(pyro.get_param_store()) == before[2], "the global parameter store was used"
