"""The fixture `say`, for all command-line tests that do not define another one."""

from tests.checkpoint_merge.typed import say  # noqa: F401
