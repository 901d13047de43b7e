"""Tools that need both the questions and the graders: the self-test, rescoring, checking data, making the tiny model."""
