"""What calibration sees: capturing calls, keeping records, replaying them, watching the inputs of layers."""
