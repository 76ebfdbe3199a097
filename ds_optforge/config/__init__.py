"""The configuration: sections of a DeepSpeed file, validated, and what they mean for one parameter."""
