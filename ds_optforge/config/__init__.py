"""The configuration: sections of a DeepSpeed file, validated, and resolved for one parameter at a time."""
