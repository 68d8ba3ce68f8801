"""Networks with a prediction branch per stage, and the contract that their artefacts obey."""
