"""The reproduction of published tables: settings, kept runs, their spread, and the published figures beside."""
