from threads import one_thread  # noqa: F401 a fixture of this package
