"""What server and hospitals both need: plans, messages, accounting, models, tasks. No network, no DICOM."""
