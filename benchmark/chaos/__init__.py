"""Mixed traffic from rude clients, with faults, and a check that nothing is lost."""
