"""One file per stage: a pure `run`, and the command around it. Stages meet only through artifacts."""
