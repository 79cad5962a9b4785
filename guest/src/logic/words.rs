//! The words of a command, and of the kernel's command line.

use alloc::string::String;
use alloc::vec::Vec;

/// A quotation mark without its partner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unterminated(pub char);

/// Splits a command at blanks. Quotes of both kinds hold words together; outside of single quotes a backslash takes the next
/// character as it is.
///
/// # Errors
/// [`Unterminated`] when a quotation has no end.
pub fn split(line: &str) -> Result<Vec<String>, Unterminated> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(mark), _) if character == mark => quote = None,
            (None, '"' | '\'') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().extend(characters.next()),
            (None, _) if character.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    match quote {
        Some(mark) => Err(Unterminated(mark)),
        None => {
            words.extend(word);
            Ok(words)
        }
    }
}

/// Options of a command, one letter each, as getopt(3) takes them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options<'a> {
    /// Letters without a value.
    pub flags: Vec<char>,
    /// Letters with a value.
    pub values: Vec<(char, &'a str)>,
    /// What is left.
    pub operands: &'a [String],
}

impl<'a> Options<'a> {
    /// Sorts `words`; `flags` and `values` are the letters that exist.
    ///
    /// # Errors
    /// The letter that does not exist or lacks its value.
    pub fn parse(mut words: &'a [String], flags: &str, values: &str) -> Result<Options<'a>, char> {
        let mut options = Options::default();
        while let Some((word, rest)) = words.split_first() {
            let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else { break };
            words = rest;
            if letters == "-" {
                break;
            }
            for (at, letter) in letters.char_indices() {
                if flags.contains(letter) {
                    options.flags.push(letter);
                    continue;
                }
                if !values.contains(letter) {
                    return Err(letter);
                }
                let value = match &letters[at + letter.len_utf8()..] {
                    "" => {
                        let (value, rest) = words.split_first().ok_or(letter)?;
                        words = rest;
                        value
                    }
                    value => value,
                };
                options.values.push((letter, value));
                break;
            }
        }
        options.operands = words;
        Ok(options)
    }

    /// Whether the flag is there.
    pub fn has(&self, letter: char) -> bool {
        self.flags.contains(&letter)
    }

    /// The last value given for the letter.
    pub fn value(&self, letter: char) -> Option<&'a str> {
        self.values.iter().rev().find(|(name, _)| *name == letter).map(|(_, value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_separate_and_quotes_hold_together() {
        let words = split(r#"  hostctl key  "two words" 'it''s' "" a\ b "\"" "#).unwrap();
        assert_eq!(words, ["hostctl", "key", "two words", "its", "", "a b", "\""]);
        assert_eq!(split(""), Ok(vec![]));
        assert_eq!(split("say \"x"), Err(Unterminated('"')));
    }

    #[test]
    fn options_are_those_of_getopt() {
        let words = split("-qf /dev/pvbus1 -t -- -key value").unwrap();
        let options = Options::parse(&words, "qt", "f").unwrap();
        assert!(options.has('q') && options.has('t') && !options.has('f'));
        assert_eq!(options.value('f'), Some("/dev/pvbus1"));
        assert_eq!(options.operands, ["-key", "value"]);
        let words = split("-f/dev/pvbus2 -").unwrap();
        let options = Options::parse(&words, "", "f").unwrap();
        assert_eq!((options.value('f'), options.operands), (Some("/dev/pvbus2"), &words[1..]));
        assert_eq!(Options::parse(&split("-x").unwrap(), "q", "f"), Err('x'));
        assert_eq!(Options::parse(&split("-f").unwrap(), "q", "f"), Err('f'));
    }
}
