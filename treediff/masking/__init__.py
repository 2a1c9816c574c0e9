"""The paper: languages, tiers of the syntax tree, tokens, and the rules that mask them (3.2 to 3.4, A.2, C)."""
