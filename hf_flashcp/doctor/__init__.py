"""Which models train exactly: tiny copies of them, run with documents split over ranks and with documents alone."""
