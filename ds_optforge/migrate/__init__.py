"""``ds-optforge init --from FILE``: the OptForge configuration that continues what a user has, with a reason for each value."""
