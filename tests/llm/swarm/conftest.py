import pytest
from language_toys import make_toy, save_toy
from swarm_toys import Servers

BLOCKS = 6


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy of six blocks, as a folder."""
    return save_toy(tmp_path_factory.mktemp("swarm") / "toy", make_toy(layers=BLOCKS))


@pytest.fixture(scope="session")
def packed_cache(tmp_path_factory):
    """A cache folder that all servers share."""
    return tmp_path_factory.mktemp("swarm_cache")


@pytest.fixture(scope="module", autouse=True)
def same_cache(packed_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(packed_cache))
        yield


@pytest.fixture
def servers(toy, packed_cache):
    """Starts servers; those that a test leaves are ended."""
    found = Servers(toy, packed_cache)
    yield found
    found.end()


@pytest.fixture(scope="module")
def lasting(toy, packed_cache):
    """Servers for a whole module."""
    found = Servers(toy, packed_cache)
    yield found
    found.end()
