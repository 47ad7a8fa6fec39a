"""The page at `/docs`: it reads `/openapi.json`, shows it and sends requests. Its files come from here alone."""
