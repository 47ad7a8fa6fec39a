"""pd-serve inside of other engines. A folder for each; nothing here is imported by what pd-serve itself runs."""
