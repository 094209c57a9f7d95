"""What the tests share: where modules are, and a place to train in."""
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


@pytest.fixture
def place(tmp_path):
    """A directory of its own, with a small corpus, to train in."""
    with small_runs.training_in(tmp_path):
        yield tmp_path
