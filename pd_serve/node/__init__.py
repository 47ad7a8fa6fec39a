"""The node's asyncio process: routers' links, registration, metrics, draining. Imports no torch."""
