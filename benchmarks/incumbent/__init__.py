"""DeepSpeed's built-in Muon: `test_claims`, what README says of it, and `measure`, the same training with both."""
