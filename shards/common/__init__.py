"""What every folder uses: errors, text, argument checks, hashed random numbers.

It imports nothing else of the project.
"""
