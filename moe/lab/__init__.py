"""Looking and measuring: prices of text, pictures of a run, benchmarks, studies."""
