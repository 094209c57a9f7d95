"""What the tests share: where modules are, and a place to train in."""
import sys

import pytest

# It puts the folders of what is tested on the path, so it comes before their modules.
import small_runs
from small_runs import one_thread


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
