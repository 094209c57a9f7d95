"""What the tests share: where modules are, a place to train in, and the options of the fuzz test."""
import pytest

# It puts the folders of what is tested on the path, so it comes before their modules.
import small_runs
from small_runs import one_thread


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=float, metavar="SECONDS", help="run test_fuzz.py, for about so long")
    parser.addoption("--fuzz_seed", type=int, metavar="N", help="with --fuzz: only its case N")


@pytest.fixture
def place(tmp_path):
    """A directory of its own, with a small corpus, to train in."""
    with small_runs.training_in(tmp_path):
        yield tmp_path
