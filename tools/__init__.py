"""The command line and what it measures with. Nothing in the other folders imports from here."""
