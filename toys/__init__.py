"""The toy experiments: each a module with `Config`, `run(config) -> Arrays`, `plot(arrays)` and `rows(arrays)`."""
