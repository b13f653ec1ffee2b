"""Stock QEMUs on the stage, with the payload guest."""
