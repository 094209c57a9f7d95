"""What the tests share: where modules are, and a place to train in."""
import pytest

# It puts the folders of what is tested on the path, so it comes before their modules.
import small_runs
from small_runs import one_thread


@pytest.fixture
def place(tmp_path):
    """A directory of its own, with a small corpus, to train in."""
    with small_runs.training_in(tmp_path):
        yield tmp_path
