"""OpenAI's Responses API (``/v1/responses``) as a translation: its request is a chat, a chat's chunks its events.

Nothing is stored: each request carries its whole conversation.
"""
