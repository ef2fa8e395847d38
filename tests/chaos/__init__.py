"""The fault suite: docs/chaos.md."""
