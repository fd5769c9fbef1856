"""AscendC operators for the Atlas 800T A2 (ascend910b) and 200I A2 (ascend310b), their build and a host harness."""
