"""The page for operators, ``GET /dashboard``: what it shows, the last minutes of it, and who watches."""
