"""What every folder uses: errors, text and tables, argument checks, back-off, hashed random numbers.

It imports nothing else of the project.
"""
