"""The catalogue of porting faults: mutants, hypotheses, and the test of the harness itself."""
