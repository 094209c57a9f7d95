"""What the tests share: where modules are, and a place to train in."""
import sys

import pytest
import torch

# It puts the folders of what is tested on the path, so it comes before their modules.
import small_runs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads make no small model faster, and where another program runs they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def commands_of_test_quartet(request, tmp_path_factory):
    """What test_quartet.py, which comes last, runs in processes starts now, and uses the second core."""
    test_quartet = sys.modules.get("test_quartet")
    if test_quartet:
        test_quartet.start_commands(request.session, tmp_path_factory.mktemp)


@pytest.fixture
def place(tmp_path):
    """A directory of its own, with a small corpus, to train in."""
    with small_runs.training_in(tmp_path):
        yield tmp_path
