"""The algorithm: settings, roll-out, advantages, update, critic, evaluation."""
