"""Anthropic's Messages API (``/v1/messages``) as a translation: its request is a chat, a chat's chunks its events."""
