"""How good a frozen backbone is. An evaluation is a file with Options and `run(options) -> dict[str, float]`."""
