"""The fixture `say`, for all tests of the command line that do not have their own."""

from tests.checkpoint_merge.typed import say  # noqa: F401
