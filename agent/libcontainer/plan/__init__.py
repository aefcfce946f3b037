"""Configuration records turned into the messages that nsexec carries out."""
