"""The options: `Int4Config`, and how what a user gives becomes one."""
