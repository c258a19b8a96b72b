"""The options: `Int4Config`, and how the options that a user passes become one."""
