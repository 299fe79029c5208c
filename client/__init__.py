"""A hospital: intake, private training, privacy ledger, guard. Runs only code the hospital installed."""
