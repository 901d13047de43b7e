"""Tools that use both questions and graders: the self-test, rescoring, the data check, and training the tiny model."""
