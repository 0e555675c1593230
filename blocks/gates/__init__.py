"""Gates: decays, step sizes, momenta, thresholds and read-out gates. One file a choice."""
