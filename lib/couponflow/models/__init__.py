"""Networks, calibration and the model bundle; torch only."""
