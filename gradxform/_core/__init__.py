"""The machinery: rules for one array, lifted to trees. README.md beside this file explains it."""
