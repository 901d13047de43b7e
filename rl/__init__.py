"""How to learn: the policy, the roll-out, the algorithms, the update, the evaluation and the run folder."""
